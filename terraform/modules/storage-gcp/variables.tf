variable "name" {
  description = "Name of the installation; begins the name of everything made here."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 20 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "project_id" {
  description = "The Google Cloud project."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id must be a project's id, such as my-project-123 (neither its number nor its title)."
  }
}

variable "region" {
  description = "Region, such as europe-west4."
  type        = string
  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region such as europe-west4, not a zone."
  }
}

variable "kms_key_id" {
  description = "Key for what is stored (module `encryption-gcp`)."
  type        = string
  validation {
    condition     = can(regex("^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$", var.kms_key_id))
    error_message = "kms_key_id must look like projects/P/locations/L/keyRings/R/cryptoKeys/K."
  }
}

variable "workload_pool" {
  description = "Workload Identity pool of the cluster (output of `cluster-gke`)."
  type        = string
  validation {
    condition     = endswith(var.workload_pool, ".svc.id.goog")
    error_message = "workload_pool must look like my-project-123.svc.id.goog."
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
  description = "Bucket for access logs; without one, none are kept."
  type        = string
  default     = null
  validation {
    condition     = var.access_log_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$", var.access_log_bucket))
    error_message = "access_log_bucket must be the name of a bucket, without s3:// or gs://."
  }
}
