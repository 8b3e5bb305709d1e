mock_provider "google" {}

variables {
  name       = "moeray"
  project_id = "my-project-123"
  region     = "europe-west4"
}

run "managed_services_have_a_range_of_their_own" {
  command = plan
  assert {
    condition     = local.managed_address == "10.66.0.0" && local.managed_prefix == 20
    error_message = "the peering's range is cidrs.managed"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    name              = "m"
    project_id        = "P"
    region            = "west"
    cidrs             = { nodes = "8.8.8.0/24" }
    egress            = "single-nat"
    flow_log_sampling = 0
  }
  expect_failures = [var.name, var.project_id, var.region, var.cidrs, var.egress, var.flow_log_sampling]
}

run "ranges_must_differ" {
  command = plan
  variables {
    cidrs = { nodes = "10.68.0.0/14" }
  }
  expect_failures = [var.cidrs]
}
