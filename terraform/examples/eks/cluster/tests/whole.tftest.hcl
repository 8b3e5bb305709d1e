# Everything together, with example.tfvars (`terraform test -var-file=example.tfvars`).
mock_provider "aws" {
  source = "../../../mocks/aws"
}

# Two subnets have two ids, which a mock alone does not know.
override_resource {
  target = module.network.aws_subnet.private["us-east-1a"]
  values = { id = "subnet-a" }
}

override_resource {
  target = module.network.aws_subnet.private["us-east-1b"]
  values = { id = "subnet-b" }
}

variables {
  redis_password = "0123456789abcdef0123456789abcdef"
}

run "modules_fit_together_and_the_second_root_gets_what_it_needs" {
  assert {
    condition     = toset(keys(output.install)) == toset(["region", "cluster_name", "pools", "redis_url", "checkpoint_uri"])
    error_message = "the outputs must be the variables of ../moeray"
  }
  assert {
    condition     = output.install.pools.experts.nodeSelector["moeray.io/pool"] == "experts" && output.install.pools.attention.resources["nvidia.com/gpu"] == "8"
    error_message = "each pool is handed on with its node selector and GPUs"
  }
  assert {
    condition     = !strcontains(jsonencode(output.install), var.redis_password)
    error_message = "no secret is handed on"
  }
}

run "a_zone_that_is_not_ours_is_named" {
  command = plan
  variables {
    zones = ["us-east-1b", "us-east-1c"]
  }
  expect_failures = [var.pools]
}
