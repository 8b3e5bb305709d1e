locals {
  eviction = { state = "noeviction", cache = "allkeys-lru" }[var.use]
}
