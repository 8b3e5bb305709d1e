"""One attention shard: the process around vLLM's EngineCore and its relay to the ingresses."""
