# Redis outside the cluster: Ray's fault tolerance and the controller's state (`use = "state"`), or a cache (`use =
# "cache"`).
#
# The two want opposite things when memory is full: state must never be thrown away, a cache always. Hence one
# instance for each. TLS and a password are required, data is encrypted, a replica in another zone takes over. The
# password is also put into Secrets Manager, from where an operator brings it into the cluster; the chart takes a
# Kubernetes Secret by name and never the password.

locals {
  fullname = "${var.name}-${var.use}"
}

resource "aws_elasticache_subnet_group" "this" {
  name       = local.fullname
  subnet_ids = var.subnet_ids
}

resource "aws_elasticache_parameter_group" "this" {
  name   = local.fullname
  family = "redis7"
  parameter {
    name  = "maxmemory-policy"
    value = { state = "noeviction", cache = "allkeys-lru" }[var.use]
  }
}

resource "aws_security_group" "this" {
  name_prefix = "${local.fullname}-redis-"
  description = "Redis of one moeray installation"
  vpc_id      = var.vpc_id
  lifecycle { create_before_destroy = true }
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each                     = var.client_security_groups
  security_group_id            = aws_security_group.this.id
  referenced_security_group_id = each.value
  description                  = "Redis from ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = 6379
  to_port                      = 6379
}

resource "aws_elasticache_replication_group" "this" {
  #checkov:skip=CKV_AWS_134:snapshots are kept for state; a cache has nothing to restore
  replication_group_id = local.fullname
  description          = "moeray ${var.name}: ${var.use}"
  engine               = "redis"
  engine_version       = "7.1"
  node_type            = var.node_type
  port                 = 6379
  num_cache_clusters   = 1 + var.num_replicas

  automatic_failover_enabled = var.num_replicas > 0
  multi_az_enabled           = var.num_replicas > 0
  subnet_group_name          = aws_elasticache_subnet_group.this.name
  security_group_ids         = [aws_security_group.this.id]
  parameter_group_name       = aws_elasticache_parameter_group.this.name

  at_rest_encryption_enabled = true
  kms_key_id                 = var.kms_key_arn
  transit_encryption_enabled = true
  transit_encryption_mode    = "required"
  auth_token                 = var.password
  auth_token_update_strategy = "ROTATE"

  # Losing a cache costs time; losing state costs what tenants were promised.
  snapshot_retention_limit   = var.use == "state" ? 7 : 0
  final_snapshot_identifier  = var.use == "state" ? "${local.fullname}-final" : null
  auto_minor_version_upgrade = true
}

resource "aws_secretsmanager_secret" "password" {
  #checkov:skip=CKV2_AWS_57:Redis and every client must change together; rotated by `password` and `password_version`, docs/terraform.md
  name_prefix = "${var.name}/redis-${var.use}-"
  description = "Password of moeray's Redis"
  kms_key_id  = var.kms_key_arn
}

resource "aws_secretsmanager_secret_version" "password" {
  secret_id                = aws_secretsmanager_secret.password.id
  secret_string_wo         = var.password
  secret_string_wo_version = var.password_version
}
