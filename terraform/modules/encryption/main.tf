# One customer-managed KMS key for everything that the other modules store: Kubernetes secrets, disks, logs,
# checkpoints, Redis.
#
# It rotates every year. Access is given by IAM policies of the account, except for three services that need it in the
# key's own policy: Auto Scaling (which starts nodes with encrypted disks), FSx for Lustre (which reads the bucket) and
# CloudWatch Logs, all of this account alone.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

locals {
  account   = data.aws_caller_identity.current.account_id
  partition = data.aws_partition.current.partition
  region    = data.aws_region.current.name

  service_roles    = "arn:${local.partition}:iam::${local.account}:role/aws-service-role"
  autoscaling_role = "${local.service_roles}/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
  lustre_role      = "${local.service_roles}/s3.data-source.lustre.fsx.amazonaws.com/AWSServiceRoleForFSxS3Access_*"
  use_key          = ["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"]
}

resource "aws_kms_key" "this" {
  description             = "moeray ${var.name}: secrets, disks, logs, checkpoints, Redis"
  enable_key_rotation     = true
  deletion_window_in_days = var.deletion_window_days

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        # In a key's policy "*" is this key. Without this statement no IAM policy could give access, and nobody could repair it.
        Sid       = "AccountDecidesByIam"
        Effect    = "Allow"
        Principal = { AWS = "arn:${local.partition}:iam::${local.account}:root" }
        Action    = "kms:*"
        Resource  = "*"
      },
      {
        Sid       = "AutoScalingUsesDisks"
        Effect    = "Allow"
        Principal = { AWS = local.autoscaling_role }
        Action    = local.use_key
        Resource  = "*"
      },
      {
        Sid       = "AutoScalingGrantsDisks"
        Effect    = "Allow"
        Principal = { AWS = local.autoscaling_role }
        Action    = "kms:CreateGrant"
        Resource  = "*"
        Condition = { Bool = { "kms:GrantIsForAWSResource" = "true" } }
      },
      {
        # FSx reads the bucket as a role of its own, made with the file system: no IAM policy can be attached to it.
        Sid       = "LustreReadsCheckpoints"
        Effect    = "Allow"
        Principal = { AWS = "*" }
        Action    = ["kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey"]
        Resource  = "*"
        Condition = {
          StringEquals = { "kms:CallerAccount" = local.account }
          ArnLike      = { "aws:PrincipalArn" = local.lustre_role }
        }
      },
      {
        Sid       = "LogsOfThisAccount"
        Effect    = "Allow"
        Principal = { Service = "logs.${local.region}.amazonaws.com" }
        Action    = local.use_key
        Resource  = "*"
        Condition = {
          ArnLike = { "kms:EncryptionContext:aws:logs:arn" = "arn:${local.partition}:logs:${local.region}:${local.account}:log-group:*" }
        }
      },
    ]
  })
}

resource "aws_kms_alias" "this" {
  name          = "alias/${var.name}"
  target_key_id = aws_kms_key.this.key_id
}
