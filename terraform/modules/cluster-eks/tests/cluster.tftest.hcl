mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  name            = "moeray"
  subnet_ids      = ["subnet-1", "subnet-2"]
  kms_key_arn     = "arn:aws:kms:us-east-1:000000000000:key/mock"
  admin_role_arns = { platform = "arn:aws:iam::000000000000:role/platform" }
}

run "api_server_is_private_and_secrets_are_encrypted" {
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "no public endpoint unless asked for"
  }
  assert {
    condition     = aws_eks_cluster.this.encryption_config[0].provider[0].key_arn == var.kms_key_arn
    error_message = "secrets are encrypted with the installation's key"
  }
  assert {
    condition     = length(aws_eks_cluster.this.enabled_cluster_log_types) == 5 && aws_cloudwatch_log_group.control_plane.kms_key_id == var.kms_key_arn
    error_message = "every control plane log is kept, encrypted"
  }
  assert {
    condition     = aws_eks_cluster.this.access_config[0].authentication_mode == "API" && !aws_eks_cluster.this.access_config[0].bootstrap_cluster_creator_admin_permissions
    error_message = "rights come from access entries alone"
  }
  assert {
    condition     = keys(aws_eks_access_policy_association.admin) == ["platform"]
    error_message = "the named role administers the cluster"
  }
  assert {
    condition     = jsondecode(aws_eks_addon.vpc_cni.configuration_values).enableNetworkPolicy == "true"
    error_message = "NetworkPolicies must be enforced"
  }
}

run "pods_cannot_use_their_nodes_rights" {
  command = plan
  assert {
    condition     = aws_launch_template.system.metadata_options[0].http_tokens == "required" && aws_launch_template.system.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "IMDSv2 with one hop"
  }
  assert {
    condition     = keys(aws_iam_role_policy_attachment.node) == ["AmazonEC2ContainerRegistryPullOnly", "AmazonEKSWorkerNodePolicy"]
    error_message = "nodes join and pull, nothing else"
  }
  assert {
    condition     = aws_launch_template.system.block_device_mappings[0].ebs[0].encrypted == "true" && aws_launch_template.system.block_device_mappings[0].ebs[0].kms_key_id == var.kms_key_arn
    error_message = "disks are encrypted with the installation's key"
  }
  assert {
    condition     = aws_eks_node_group.system.labels["moeray.io/pool"] == "ingress"
    error_message = "CPU nodes carry the label that the ingress selects"
  }
}

run "autoscaler_changes_only_this_cluster" {
  command = plan
  assert {
    condition = alltrue([
      for s in jsondecode(aws_iam_role_policy.autoscaler.policy).Statement :
      s.Resource != "*" || try(s.Condition.StringEquals["aws:ResourceTag/eks:cluster-name"], "") == var.name || alltrue([
        for action in flatten([s.Action]) : can(regex("^[a-z0-9]+:(Describe|Get)", action))
      ])
    ])
    error_message = "a statement about every resource must only look, or be bound to this cluster's tag"
  }
}

run "named_addresses_may_be_let_in" {
  command = plan
  variables { public_access_cidrs = ["203.0.113.0/28"] }
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["203.0.113.0/28"])
    error_message = "the public endpoint is for the named addresses"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    name                 = "a-name-that-is-far-too-long-for-a-cluster"
    kubernetes_version   = "1.28"
    subnet_ids           = ["subnet-1", "subnet-1"]
    kms_key_arn          = "key"
    private_access_cidrs = ["0.0.0.0/0"]
    public_access_cidrs  = ["0.0.0.0/0"]
    admin_role_arns      = {}
    system_nodes         = { min = 1, disk_gib = 20, instance_types = ["p5.48xlarge"] }
    log_days             = 0
  }
  expect_failures = [
    var.name, var.kubernetes_version, var.subnet_ids, var.kms_key_arn, var.private_access_cidrs, var.public_access_cidrs,
    var.admin_role_arns, var.system_nodes, var.log_days,
  ]
}
