mock_provider "helm" {}

variables {
  chart = "./helm/moeray"
  pools = {
    experts = {
      nodeSelector = { "moeray.io/pool" = "experts" }
      tolerations  = [{ key = "nvidia.com/gpu", operator = "Equal", value = "present", effect = "NoSchedule" }]
      resources    = { "nvidia.com/gpu" = "8" }
    }
  }
  redis          = { url = "rediss://redis.invalid:6379/0", existing_secret = "moeray-redis" }
  checkpoint_uri = "s3://bucket/models/v4"
  values         = ["image:\n  tag: 1.2.3\nauth:\n  existingSecret: tenants\n"]
}

run "worker_groups_carry_what_their_nodes_ask_for" {
  command = plan
  assert {
    condition     = yamldecode(local.values[0]).workerGroups.experts.nodeSelector["moeray.io/pool"] == "experts"
    error_message = "the group goes to its pool's nodes"
  }
  assert {
    condition     = yamldecode(local.values[0]).workerGroups.experts.tolerations[0].key == "nvidia.com/gpu" && yamldecode(local.values[0]).workerGroups.experts.resources.limits["nvidia.com/gpu"] == "8"
    error_message = "the group tolerates the taint and takes the GPUs"
  }
  assert {
    condition     = yamldecode(local.values[0]).redis == { url = "rediss://redis.invalid:6379/0", existingSecret = "moeray-redis" }
    error_message = "Redis is named, its password is not"
  }
  assert {
    condition     = yamldecode(local.values[0]).checkpoint.uri == "s3://bucket/models/v4" && yamldecode(local.values[0]).serviceAccount.name == "moeray"
    error_message = "the checkpoint is read by the service account that may"
  }
  assert {
    condition     = length(local.values) == 2 && local.values[1] == var.values[0]
    error_message = "the caller's values come last and win"
  }
}

run "what_is_not_given_is_left_to_the_chart" {
  command = plan
  variables {
    pools          = {}
    redis          = null
    checkpoint_uri = null
    values         = []
  }
  assert {
    condition     = keys(yamldecode(local.values[0])) == ["serviceAccount"]
    error_message = "no empty map may hide the chart's defaults"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    release_name    = "Moeray"
    namespace       = "default"
    repository      = "http://charts.invalid"
    chart_version   = ">= 1.0"
    redis           = { url = "redis://:secret@redis.invalid:6379/0", existing_secret = "" }
    checkpoint_uri  = "https://bucket/path"
    service_account = "default"
    values          = ["redis:\n  password: hunter2\n"]
    timeout_s       = 10
    pools = {
      experts = { nodeSelector = { "moeray.io/pool" = "attention" }, tolerations = [], resources = {} }
    }
  }
  expect_failures = [
    var.release_name, var.namespace, var.repository, var.chart_version, var.redis, var.checkpoint_uri, var.service_account, var.values,
    var.timeout_s, var.pools,
  ]
}

run "a_path_in_place_of_values_is_named" {
  command = plan
  variables { values = ["values.yaml"] }
  expect_failures = [var.values]
}

run "a_chart_from_a_registry_needs_its_version" {
  command = plan
  variables { chart = "oci://registry.invalid/charts/moeray" }
  expect_failures = [var.chart_version]
}

run "an_empty_chart_is_named" {
  command = plan
  variables {
    chart         = ""
    chart_version = "1.2.3"
  }
  expect_failures = [var.chart]
}
