output "host" {
  description = "Host of the primary."
  value       = aws_elasticache_replication_group.this.primary_endpoint_address
}

output "url" {
  description = "URL without the password, as `redis.url` of cluster.yaml wants it. TLS: rediss."
  value       = "rediss://${aws_elasticache_replication_group.this.primary_endpoint_address}:6379/0"
}

output "password_secret_arn" {
  description = "Secrets Manager's secret with the password."
  value       = aws_secretsmanager_secret.password.arn
}
