mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  name                   = "moeray"
  vpc_id                 = "vpc-1"
  subnet_ids             = ["subnet-1", "subnet-2"]
  client_security_groups = { nodes = "sg-1" }
  kms_key_arn            = "arn:aws:kms:us-east-1:000000000000:key/mock"
  password               = "0123456789abcdef0123456789abcdef"
}

run "state_is_never_evicted_and_survives_a_zone" {
  assert {
    condition     = [for p in aws_elasticache_parameter_group.this.parameter : p.value] == ["noeviction"]
    error_message = "state must not be evicted"
  }
  assert {
    condition = alltrue([
      aws_elasticache_replication_group.this.automatic_failover_enabled, aws_elasticache_replication_group.this.multi_az_enabled,
      aws_elasticache_replication_group.this.num_cache_clusters == 2, aws_elasticache_replication_group.this.snapshot_retention_limit == 7,
    ])
    error_message = "a replica in another zone, snapshots for a week"
  }
  assert {
    condition = alltrue([
      aws_elasticache_replication_group.this.at_rest_encryption_enabled == "true",
      aws_elasticache_replication_group.this.transit_encryption_enabled,
      aws_elasticache_replication_group.this.transit_encryption_mode == "required",
      aws_elasticache_replication_group.this.kms_key_id == var.kms_key_arn,
      aws_elasticache_replication_group.this.auth_token == var.password,
    ])
    error_message = "TLS, a password, and the installation's key"
  }
  assert {
    condition     = output.url == "rediss://redis.mock.invalid:6379/0"
    error_message = "the URL says TLS and holds no password"
  }
  assert {
    condition     = aws_secretsmanager_secret_version.password.secret_string == null
    error_message = "the secret's value is not written into the state"
  }
  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.clients : rule.cidr_ipv4 == null && rule.from_port == 6379 && rule.to_port == 6379])
    error_message = "only members of the clients' groups connect"
  }
}

run "a_cache_evicts_and_keeps_no_snapshot" {
  command = plan
  variables {
    use          = "cache"
    num_replicas = 0
    subnet_ids   = ["subnet-1"]
  }
  assert {
    condition     = [for p in aws_elasticache_parameter_group.this.parameter : p.value] == ["allkeys-lru"] && aws_elasticache_replication_group.this.snapshot_retention_limit == 0
    error_message = "a cache evicts"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    vpc_id                 = "10.0.0.0/16"
    name                   = "x--y"
    use                    = "both"
    client_security_groups = {}
    kms_key_arn            = "key"
    node_type              = "m7g.large"
    password               = "short"
    password_version       = 0
  }
  expect_failures = [
    var.vpc_id,
    var.name, var.use, var.client_security_groups, var.kms_key_arn, var.node_type, var.password, var.password_version,
  ]
}

run "a_replica_without_a_second_zone_is_refused" {
  command = plan
  variables { subnet_ids = ["subnet-1"] }
  expect_failures = [var.subnet_ids]
}

run "state_without_a_replica_is_refused" {
  command = plan
  variables { num_replicas = 0 }
  expect_failures = [var.num_replicas]
}
