"""An ingress in a process of its own, to be killed. Arguments: MODEL HTTP_PORT GRPC_PORT SHARD=ADDRESS."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from front_process import MODEL

from moeray.ingress.server import IngressServer, IngressSettings


async def main(model: Path, http_port: int, grpc_port: int, shard: str) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, where the ports alone are read
    front = {"model": str(model), "model_name": MODEL, "engine_args": {}}
    settings = IngressSettings("killed", front, http_port=http_port, grpc_port=grpc_port, shares_ports=True)
    server = IngressServer(settings)
    await server.start()
    await server.set_shards(dict([shard.split("=")]))
    while server.describe()["shards"]["s0"]["state"] != "ready":
        await asyncio.sleep(0.05)
    print(server.http_port, server.grpc_port, file=said, flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
