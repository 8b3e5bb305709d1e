"""The front door: OpenAI HTTP and gRPC over a pool of attention shards."""
