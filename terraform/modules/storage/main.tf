# Where checkpoints lie: an S3 bucket that only TLS and the given key open, a role that reads it, and on request a
# Lustre file system in front of it, so that a node reads a checkpoint at the network's speed and many nodes read it
# once from S3.
#
# moeray's pods read and never write: who publishes a checkpoint has rights of his own.

locals {
  bucket_objects = "${aws_s3_bucket.checkpoints.arn}/${var.prefix}*"
}

resource "aws_s3_bucket" "checkpoints" {
  #checkov:skip=CKV_AWS_18:access logs go where the caller keeps them (access_log_bucket); a log bucket of every installation would be a second one to guard
  #checkov:skip=CKV_AWS_144:a checkpoint is a copy of what its publisher has; a second region would double the largest storage cost
  #checkov:skip=CKV2_AWS_62:nothing in moeray acts on events of the bucket
  bucket_prefix = "${var.name}-checkpoints-"
}

resource "aws_s3_bucket_ownership_controls" "checkpoints" {
  bucket = aws_s3_bucket.checkpoints.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "checkpoints" {
  bucket                  = aws_s3_bucket.checkpoints.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "checkpoints" {
  bucket = aws_s3_bucket.checkpoints.id
  rule {
    bucket_key_enabled = true
    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = var.kms_key_arn
    }
  }
}

resource "aws_s3_bucket_versioning" "checkpoints" {
  # A checkpoint overwritten by mistake can be had back.
  bucket = aws_s3_bucket.checkpoints.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "checkpoints" {
  bucket = aws_s3_bucket.checkpoints.id
  rule {
    id     = "old-versions-and-broken-uploads"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = var.old_version_days
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
  depends_on = [aws_s3_bucket_versioning.checkpoints]
}

resource "aws_s3_bucket_logging" "checkpoints" {
  count         = var.access_log_bucket == null ? 0 : 1
  bucket        = aws_s3_bucket.checkpoints.id
  target_bucket = var.access_log_bucket
  target_prefix = "${var.name}-checkpoints/"
}

resource "aws_s3_bucket_policy" "checkpoints" {
  bucket = aws_s3_bucket.checkpoints.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "TlsOnly"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.checkpoints.arn, "${aws_s3_bucket.checkpoints.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
  depends_on = [aws_s3_bucket_public_access_block.checkpoints]
}

# --- who reads ------------------------------------------------------------------------------------------------------

resource "aws_iam_role" "reader" {
  name_prefix = "${var.name}-checkpoints-"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
    }]
  })
}

resource "aws_iam_role_policy" "reader" {
  name = "read-checkpoints"
  role = aws_iam_role.reader.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Sid = "Read", Effect = "Allow", Action = "s3:GetObject", Resource = local.bucket_objects },
      {
        Sid       = "List"
        Effect    = "Allow"
        Action    = "s3:ListBucket"
        Resource  = aws_s3_bucket.checkpoints.arn
        Condition = { StringLike = { "s3:prefix" = ["${var.prefix}*"] } }
      },
      { Sid = "Decrypt", Effect = "Allow", Action = "kms:Decrypt", Resource = var.kms_key_arn },
    ]
  })
}

resource "aws_eks_pod_identity_association" "reader" {
  cluster_name    = var.cluster_name
  namespace       = var.service_account.namespace
  service_account = var.service_account.name
  role_arn        = aws_iam_role.reader.arn
}

# --- Lustre ---------------------------------------------------------------------------------------------------------

resource "aws_security_group" "lustre" {
  count       = var.lustre == null ? 0 : 1
  name_prefix = "${var.name}-lustre-"
  description = "Lustre for the nodes of one moeray installation"
  vpc_id      = var.vpc_id
  lifecycle { create_before_destroy = true }
}

resource "aws_vpc_security_group_ingress_rule" "lustre" {
  # Clients and servers both open connections, to 988 and 1018-1023.
  for_each = var.lustre == null ? {} : {
    nodes-988    = { from = 988, to = 988, group = var.node_security_group_id }
    nodes-1018   = { from = 1018, to = 1023, group = var.node_security_group_id }
    servers-988  = { from = 988, to = 988, group = aws_security_group.lustre[0].id }
    servers-1018 = { from = 1018, to = 1023, group = aws_security_group.lustre[0].id }
  }
  security_group_id            = aws_security_group.lustre[0].id
  referenced_security_group_id = each.value.group
  description                  = "Lustre from ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_egress_rule" "lustre" {
  for_each = var.lustre == null ? {} : {
    nodes   = var.node_security_group_id
    servers = aws_security_group.lustre[0].id
  }
  security_group_id            = aws_security_group.lustre[0].id
  referenced_security_group_id = each.value
  description                  = "Lustre to ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = 988
  to_port                      = 1023
}

resource "aws_fsx_lustre_file_system" "this" {
  count                       = var.lustre == null ? 0 : 1
  deployment_type             = "PERSISTENT_2"
  storage_type                = "SSD"
  storage_capacity            = var.lustre.gib
  per_unit_storage_throughput = var.lustre.mbps_per_tib
  subnet_ids                  = [var.lustre.subnet_id]
  security_group_ids          = [aws_security_group.lustre[0].id]
  kms_key_id                  = var.kms_key_arn
  data_compression_type       = "NONE" # weights do not compress
  # A copy of what S3 has: nothing in it is worth a backup.
  automatic_backup_retention_days = 0
  skip_final_backup               = true
  tags                            = { Name = "${var.name}-checkpoints" }

  metadata_configuration {
    mode = "AUTOMATIC"
  }
}

resource "aws_fsx_data_repository_association" "checkpoints" {
  count                            = var.lustre == null ? 0 : 1
  file_system_id                   = aws_fsx_lustre_file_system.this[0].id
  file_system_path                 = "/checkpoints"
  data_repository_path             = "s3://${aws_s3_bucket.checkpoints.id}/${var.prefix}"
  batch_import_meta_data_on_create = true
  s3 {
    auto_import_policy {
      events = ["NEW", "CHANGED", "DELETED"]
    }
  }
}
