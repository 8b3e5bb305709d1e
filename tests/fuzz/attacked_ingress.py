"""The ingress under attack, in a process of its own to watch its memory. Arguments: MODEL FOLDER SHARD=ADDRESS.

Prints its ports; then, for each line that it reads, how many requests are left where, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from front_process import MODEL
from tenants import Tenants

from moeray.config import BatchConfig, IngressConfig
from moeray.ingress.batches.store import BatchStore
from moeray.ingress.server import IngressServer, IngressSettings


async def main(model: Path, folder: Path, shard: str) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, where the ports alone are read
    front = {"model": str(model), "model_name": MODEL, "engine_args": {}}
    batches = BatchConfig(directory=str(folder / "batches"))
    limits = IngressConfig(head_timeout_s=5.0, body_timeout_s=5.0, batches=batches)
    settings = IngressSettings("i0", front, http_port=0, grpc_port=0, limits=limits, **Tenants(folder).settings)
    server = IngressServer(settings)
    await server.start()
    await server.set_shards(dict([shard.split("=")]))
    while server.describe()["shards"]["s0"]["state"] != "ready":
        await asyncio.sleep(0.05)
    print(server.http_port, server.grpc_port, file=said, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        left = {"the pool": server.num_requests, "admission": server.describe()["admission"]["requests"]}
        left["batches"] = sum(not batch.has_ended for batch in BatchStore(Path(batches.directory)).batches())
        print(json.dumps(left), file=said, flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
