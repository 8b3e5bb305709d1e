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

variable "use" {
  description = "`state`: nothing is ever evicted, snapshots are kept. `cache`: the least recently used goes."
  type        = string
  default     = "state"
  validation {
    condition     = contains(["state", "cache"], var.use)
    error_message = "use must be state or cache; one instance cannot be both."
  }
}

variable "network_id" {
  description = "The VPC, with its peering for managed services (output of `network-gcp`)."
  type        = string
  validation {
    condition     = can(regex("networks/[^/]+$", var.network_id))
    error_message = "network_id must be the id of a VPC network (projects/P/global/networks/N)."
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

variable "memory_gib" {
  description = "Memory, GiB."
  type        = number
  default     = 5
  validation {
    condition     = var.memory_gib >= 1 && var.memory_gib <= 300 && floor(var.memory_gib) == var.memory_gib
    error_message = "memory_gib must be a whole number from 1 to 300."
  }
}

variable "highly_available" {
  description = "A replica in another zone takes over."
  type        = bool
  default     = true
  validation {
    condition     = var.highly_available || var.use == "cache"
    error_message = "highly_available must be true for use = state: one node's loss would lose the cluster's state."
  }
}
