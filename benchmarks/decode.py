"""What does the split cost? Decode throughput of split topologies against the same engine with its experts inside.

    python benchmarks/decode.py [--quick] [--json FILE]

Two clusters run at the same time on the same cores and are asked in turn, A B A B ..., so that both see the same noise.
The ratio is taken pair by pair; above 1 the split is faster. Greedy, end-of-sequence ignored, OpenAI HTTP.

This is the product as a client sees it: ingress, relay and Ray included, no process pinned by hand, moeray's own
experts inside the baseline. What a step alone costs beside plain vLLM: step.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import time
import urllib.request
from pathlib import Path

import records
from whole import cluster

BASELINE = {"attention": {"num_shards": 1}, "transport": {"backend": "local"}}
TOPOLOGIES = {
    "1x1": {"attention": {"num_shards": 1}, "experts": {"num_groups": 1}},
    "1x2": {"attention": {"num_shards": 1}, "experts": {"num_groups": 2}},
    "2x2": {"attention": {"num_shards": 2}, "experts": {"num_groups": 2}},
}
TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one topology, fewer pairs (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    names, pairs = (["1x2"], 3) if options.quick else (list(TOPOLOGIES), 5)
    found: list[records.Record] = []
    with cluster(BASELINE) as baseline:
        for name in names:
            with cluster(TOPOLOGIES[name]) as split:
                for concurrency in (1, 8):
                    found.append(compare(name, split.http, baseline.http, concurrency, pairs))
                    print(describe(found[-1]), flush=True)
    if options.json:
        records.write(options.json, found, pairs=pairs)


def compare(name: str, split: str, baseline: str, concurrency: int, pairs: int) -> records.Record:
    """Interleaved pairs after one warm-up of each."""
    for url in (split, baseline):
        tokens_per_s(url, concurrency)
    measured = [(tokens_per_s(split, concurrency), tokens_per_s(baseline, concurrency)) for _ in range(pairs)]
    ratios = [ours / theirs for ours, theirs in measured]
    return {
        "topology": name,
        "concurrency": concurrency,
        "tokens_per_s": statistics.median(ours for ours, _ in measured),
        "baseline_tokens_per_s": statistics.median(theirs for _, theirs in measured),
        **records.spread(ratios),
        "pairs": pairs,
    }


def describe(record: records.Record) -> str:
    return (
        f"{record['topology']} at concurrency {record['concurrency']}: {record['tokens_per_s']:6.1f} tokens/s, "
        f"experts inside {record['baseline_tokens_per_s']:6.1f}; "
        f"ratio {record['ratio']:.2f} ({record['ratio_min']:.2f}..{record['ratio_max']:.2f})"
    )


def tokens_per_s(url: str, concurrency: int) -> float:
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        tokens = sum(pool.map(lambda number: complete(url, number), range(concurrency)))
    return tokens / (time.perf_counter() - started)


def complete(url: str, number: int) -> int:
    body = {
        "model": "moeray-tiny",
        "prompt": f"{number} expert groups",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        return int(json.loads(answer.read())["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
