output "install" {
  description = "What ../moeray takes, as its variables."
  value = {
    project_id     = var.project_id
    region         = var.region
    cluster_name   = module.cluster.name
    pools          = { for pool, nodes in module.gpu_nodepool : pool => nodes.scheduling }
    redis_url      = module.redis.url
    checkpoint_uri = module.storage.checkpoint_uri
  }
}

output "redis" {
  description = "For the Kubernetes Secret: the instance whose password `gcloud redis instances get-auth-string` tells, and whom to trust."
  value = {
    instance              = module.redis.instance
    certificate_authority = module.redis.certificate_authority
  }
}
