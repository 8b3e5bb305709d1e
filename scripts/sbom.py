"""What is installed beside this Python, as a CycloneDX 1.6 document: the images' bill of materials.

    python scripts/sbom.py --name moeray --output sbom.cdx.json

Uses the standard library alone, so that it runs in any environment that it is to describe.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the image")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    document = bill(options.name)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {len(document['components'])} packages", file=sys.stderr)


def bill(name: str) -> dict[str, Any]:
    """The document; packages by name, each once."""
    found = {component["bom-ref"]: component for component in map(_component, distributions())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {"type": "container", "name": name, "bom-ref": name},
        },
        "components": [found[key] for key in sorted(found)],
    }


def _component(package: Distribution) -> dict[str, Any]:
    name, version = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(), package.version
    address = f"pkg:pypi/{name}@{version}"
    component: dict[str, Any] = {
        "type": "library", "name": name, "version": version, "purl": address, "bom-ref": address,
    }  # fmt: skip
    known = {key: package.metadata[key] for key in ("License-Expression", "License") if key in package.metadata}
    if "License-Expression" in known:
        component["licenses"] = [{"expression": known["License-Expression"]}]
    elif known.get("License") and "\n" not in known["License"]:
        component["licenses"] = [{"license": {"name": known["License"]}}]
    return component


if __name__ == "__main__":
    main()
