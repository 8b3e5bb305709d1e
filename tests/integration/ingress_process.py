"""An ingress in a process of its own, to be killed; SIGTERM drains it.

Arguments: MODEL HTTP_PORT GRPC_PORT SHARD=ADDRESS.
"""

from __future__ import annotations

import asyncio
import os
import signal
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

    async def link() -> None:  # as a replica: beside another ingress it serves only once it has a shard
        await server.set_shards(dict([shard.split("=")]))
        while not server.is_serving:
            await asyncio.sleep(0.05)

    await server.start(link)
    print(server.http_port, server.grpc_port, file=said, flush=True)
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await told.wait()
    await server.stop(200)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
