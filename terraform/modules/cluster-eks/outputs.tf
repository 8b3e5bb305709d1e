output "name" {
  description = "The cluster's name; known only when its CPU nodes and addons are there."
  value       = aws_eks_cluster.this.name
  depends_on  = [aws_eks_addon.coredns]
}

output "endpoint" {
  description = "Address of the API server; private unless `public_access_cidrs` is set."
  value       = aws_eks_cluster.this.endpoint
}

output "certificate_authority" {
  description = "The API server's certificate authority, base64."
  value       = aws_eks_cluster.this.certificate_authority[0].data
}

output "security_group_id" {
  description = "Security group of all nodes and of the control plane."
  value       = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
}

output "node_role_arn" {
  description = "Role of the nodes; module `gpu-nodepool` takes it."
  value       = aws_iam_role.node.arn
}
