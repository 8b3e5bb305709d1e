"""Everything that touches vLLM's internals; README.md lists each touch point and the test that watches it."""
