mock_provider "google" {}

variables {
  name       = "moeray"
  project_id = "my-project-123"
  region     = "europe-west4"
}

run "every_service_that_stores_may_use_the_key" {
  command = plan
  assert {
    condition     = toset(keys(local.agents)) == toset(["kubernetes", "disks", "buckets", "redis"])
    error_message = "Kubernetes secrets, disks, buckets and Redis are encrypted with the key"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    name          = "Moeray"
    project_id    = "123456789"
    region        = "europe-west4-a"
    rotation_days = 0
  }
  expect_failures = [var.name, var.project_id, var.region, var.rotation_days]
}
