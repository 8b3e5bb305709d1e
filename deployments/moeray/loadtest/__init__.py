"""`moeray bench`: load on any OpenAI server or on moeray's gRPC, and what its clients saw."""
