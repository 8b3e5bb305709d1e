mock_provider "google" {}

variables {
  name       = "moeray"
  project_id = "my-project-123"
  region     = "europe-west4"
  network_id = "projects/p/global/networks/n"
  kms_key_id = "projects/my-project-123/locations/europe-west4/keyRings/moeray/cryptoKeys/data"
}

run "state_is_never_evicted" {
  command = plan
  assert {
    condition     = local.eviction == "noeviction"
    error_message = "state must not be evicted"
  }
}

run "a_cache_evicts_and_may_be_one_node" {
  command = plan
  variables {
    use              = "cache"
    highly_available = false
  }
  assert {
    condition     = local.eviction == "allkeys-lru"
    error_message = "a cache evicts"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    network_id = "default"
    name       = "m"
    project_id = "P"
    region     = "west"
    use        = "both"
    kms_key_id = "key"
    memory_gib = 0.5
  }
  expect_failures = [
    var.network_id,
  var.name, var.project_id, var.region, var.use, var.kms_key_id, var.memory_gib]
}

run "state_without_a_replica_is_refused" {
  command = plan
  variables { highly_available = false }
  expect_failures = [var.highly_available]
}
