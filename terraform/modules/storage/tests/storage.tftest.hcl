mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  name         = "moeray"
  cluster_name = "moeray"
  kms_key_arn  = "arn:aws:kms:us-east-1:000000000000:key/mock"
  prefix       = "models/"
}

run "bucket_is_private_and_encrypted_and_pods_only_read_their_prefix" {
  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.checkpoints.block_public_acls, aws_s3_bucket_public_access_block.checkpoints.block_public_policy,
      aws_s3_bucket_public_access_block.checkpoints.ignore_public_acls, aws_s3_bucket_public_access_block.checkpoints.restrict_public_buckets,
    ])
    error_message = "nothing public"
  }
  assert {
    condition = alltrue([
      for rule in aws_s3_bucket_server_side_encryption_configuration.checkpoints.rule :
      rule.apply_server_side_encryption_by_default[0].kms_master_key_id == var.kms_key_arn
    ])
    error_message = "encrypted with the installation's key"
  }
  assert {
    condition     = jsondecode(aws_s3_bucket_policy.checkpoints.policy).Statement[0].Condition.Bool["aws:SecureTransport"] == "false" && jsondecode(aws_s3_bucket_policy.checkpoints.policy).Statement[0].Effect == "Deny"
    error_message = "TLS only"
  }
  assert {
    condition     = toset(flatten([for s in jsondecode(aws_iam_role_policy.reader.policy).Statement : s.Action])) == toset(["s3:GetObject", "s3:ListBucket", "kms:Decrypt"])
    error_message = "pods read, and nothing else"
  }
  assert {
    condition = alltrue([
      for s in jsondecode(aws_iam_role_policy.reader.policy).Statement : contains(["arn:aws:s3:::mock-checkpoints", "arn:aws:s3:::mock-checkpoints/models/*", var.kms_key_arn], s.Resource)
    ])
    error_message = "pods read this bucket's prefix with this key"
  }
  assert {
    condition     = output.checkpoint_uri == "s3://mock-checkpoints/models/" && output.lustre == null && length(aws_fsx_lustre_file_system.this) == 0
    error_message = "no file system unless asked for"
  }
}

run "lustre_is_encrypted_and_open_to_nodes_only" {
  command = plan
  variables {
    lustre                 = { gib = 4800, subnet_id = "subnet-1" }
    vpc_id                 = "vpc-1"
    node_security_group_id = "sg-nodes"
  }
  assert {
    condition     = aws_fsx_lustre_file_system.this[0].kms_key_id == var.kms_key_arn && aws_fsx_lustre_file_system.this[0].per_unit_storage_throughput == 250
    error_message = "encrypted with the installation's key"
  }
  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.lustre : rule.cidr_ipv4 == null])
    error_message = "members of security groups, no addresses"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    cluster_name      = "a/b"
    access_log_bucket = "s3://logs"
    name              = "x"
    kms_key_arn       = "key"
    service_account   = { name = "default" }
    prefix            = "models"
    old_version_days  = 0
    lustre            = { gib = 1000, mbps_per_tib = 7, subnet_id = "subnet-1" }
  }
  expect_failures = [
    var.cluster_name, var.access_log_bucket,
    var.name, var.kms_key_arn, var.service_account, var.prefix, var.old_version_days, var.lustre,
  ]
}

run "lustre_without_its_network_is_named" {
  command = plan
  variables {
    lustre = { gib = 1200, subnet_id = "subnet-1" }
  }
  expect_failures = [var.vpc_id, var.node_security_group_id]
}
