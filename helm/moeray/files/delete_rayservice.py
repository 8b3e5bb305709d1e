"""delete_rayservice.py NAMESPACE NAME SECONDS: pre-delete hook. Deletes the RayService and waits until it is gone.

KubeRay removes Ray's state from Redis when it deletes a cluster, and the cluster waits for that. `helm uninstall` alone
would delete the bundled Redis at the same time, and a cluster whose Redis went first stays. Deletion is in the
foreground: the RayService is gone when its clusters are.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
LOOK_S = float(os.environ.get("LOOK_S", "2"))
GONE = 404


def main() -> int:
    namespace, name, limit_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayservices/{name}"
    status = call("DELETE", path, {"propagationPolicy": "Foreground"})
    started = time.monotonic()
    while status != GONE:
        if time.monotonic() - started > limit_s:
            print(f"uninstall: {name} is still there after {limit_s:g} s: see its RayCluster's finalizers", flush=True)
            return 1
        time.sleep(LOOK_S)
        status = call("GET", path)
    print(f"uninstall: {name} is gone after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def call(method: str, path: str, body: dict[str, str] | None = None) -> int:
    """HTTP status of the API server's answer; 0 if there is none.

    Raises:
        HTTPError: it refuses: that does not get better.
    """
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"https://{host}:{port}{path}", None if body is None else json.dumps(body).encode(), headers, method=method
    )
    try:
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310 - always https
            return int(answer.status)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise
        return error.code
    except OSError as error:
        print(f"uninstall: the API server does not answer: {error}", flush=True)
        return 0


if __name__ == "__main__":
    sys.exit(main())
