output "install" {
  description = "What ../moeray takes, as its variables."
  value = {
    region         = var.region
    cluster_name   = module.cluster.name
    pools          = { for pool, nodes in module.gpu_nodepool : pool => nodes.scheduling }
    redis_url      = module.redis.url
    checkpoint_uri = module.storage.checkpoint_uri
  }
}

output "redis_password_secret_arn" {
  description = "Where an operator finds Redis' password for the Kubernetes Secret."
  value       = module.redis.password_secret_arn
}
