variable "name" {
  description = "Name of the installation; begins the bucket's name."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 20 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last (a bucket's name is made from it)."
  }
}

variable "kms_key_arn" {
  description = "Key for the bucket and the file system (module `encryption`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "cluster_name" {
  description = "The EKS cluster whose pods read."
  type        = string
  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$", var.cluster_name))
    error_message = "cluster_name must be the name of a cluster, neither an ARN nor an address."
  }
}

variable "service_account" {
  description = "Kubernetes service account that may read checkpoints."
  type = object({
    namespace = optional(string, "moeray")
    name      = optional(string, "moeray")
  })
  default = {}
  validation {
    condition     = !contains(["default", "*", ""], var.service_account.name) && var.service_account.namespace != "*"
    error_message = "service_account must be one of moeray's own: rights of \"default\" would be rights of every pod of the namespace."
  }
}

variable "prefix" {
  description = "Part of the bucket that pods may read, empty or ending in a slash."
  type        = string
  default     = ""
  validation {
    condition     = var.prefix == "" || can(regex("^[^/*?].*/$", var.prefix)) && !can(regex("[*?]", var.prefix))
    error_message = "prefix must be empty or end in a slash, such as models/, without * and ?."
  }
}

variable "old_version_days" {
  description = "Days that overwritten and deleted checkpoints can be had back; they are paid for so long."
  type        = number
  default     = 30
  validation {
    condition     = var.old_version_days >= 1
    error_message = "old_version_days must be at least 1."
  }
}

variable "access_log_bucket" {
  description = "Bucket for S3's access logs; without one, none are kept."
  type        = string
  default     = null
  validation {
    condition     = var.access_log_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$", var.access_log_bucket))
    error_message = "access_log_bucket must be the name of a bucket, without s3:// or gs://."
  }
}

variable "lustre" {
  description = "File system in front of the bucket: size in GiB, throughput in MB/s per TiB, the subnet of the GPU pools. Null: none."
  type = object({
    gib          = number
    mbps_per_tib = optional(number, 250)
    subnet_id    = string
  })
  default = null
  validation {
    condition     = var.lustre == null ? true : var.lustre.gib == 1200 || (var.lustre.gib >= 2400 && var.lustre.gib % 2400 == 0)
    error_message = "lustre.gib must be 1200 or a multiple of 2400 (what FSx offers)."
  }
  validation {
    condition     = var.lustre == null ? true : contains([125, 250, 500, 1000], var.lustre.mbps_per_tib)
    error_message = "lustre.mbps_per_tib must be 125, 250, 500 or 1000."
  }
}

variable "vpc_id" {
  description = "The VPC; needed with `lustre`."
  type        = string
  default     = null
  validation {
    condition     = var.lustre == null || var.vpc_id != null
    error_message = "vpc_id must be given with lustre."
  }
  validation {
    condition     = var.vpc_id == null ? true : can(regex("^vpc-", var.vpc_id))
    error_message = "vpc_id must be a VPC's id (vpc-...)."
  }
}

variable "node_security_group_id" {
  description = "Security group of the nodes (output `security_group_id` of `cluster-eks`); needed with `lustre`."
  type        = string
  default     = null
  validation {
    condition     = var.lustre == null || var.node_security_group_id != null
    error_message = "node_security_group_id must be given with lustre."
  }
  validation {
    condition     = var.node_security_group_id == null ? true : can(regex("^sg-", var.node_security_group_id))
    error_message = "node_security_group_id must be a security group's id (sg-...)."
  }
}
