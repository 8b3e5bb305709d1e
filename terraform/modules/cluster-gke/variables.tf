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

variable "network_id" {
  description = "The VPC (output of `network-gcp`)."
  type        = string
  validation {
    condition     = can(regex("networks/[^/]+$", var.network_id))
    error_message = "network_id must be the id of a VPC network (projects/P/global/networks/N)."
  }
}

variable "subnetwork_id" {
  description = "Subnet of the nodes, with secondary ranges `pods` and `services` (output of `network-gcp`)."
  type        = string
  validation {
    condition     = can(regex("subnetworks/[^/]+$", var.subnetwork_id))
    error_message = "subnetwork_id must be the id of a subnetwork (projects/P/regions/R/subnetworks/S)."
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

variable "control_plane_cidr" {
  description = "Private /28 for the control plane."
  type        = string
  default     = "10.67.0.0/28"
  validation {
    condition     = can(cidrnetmask(var.control_plane_cidr)) && endswith(var.control_plane_cidr, "/28")
    error_message = "control_plane_cidr must be a /28, such as 10.67.0.0/28 (what GKE asks for)."
  }
}

variable "private_access_cidrs" {
  description = "Name -> private range besides the nodes that may reach the API server, such as a VPN's."
  type        = map(string)
  default     = {}
  validation {
    condition = alltrue([
      for cidr in values(var.private_access_cidrs) : can(cidrnetmask(cidr)) && can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", cidr))
    ])
    error_message = "private_access_cidrs must be private IPv4 ranges: the API server has no public address."
  }
}

variable "release_channel" {
  description = "How early the control plane is upgraded: `REGULAR`, `STABLE` or `EXTENDED`."
  type        = string
  default     = "STABLE"
  validation {
    condition     = contains(["REGULAR", "STABLE", "EXTENDED"], var.release_channel)
    error_message = "release_channel must be REGULAR, STABLE or EXTENDED."
  }
}

variable "system_nodes" {
  description = "CPU nodes for Ray's head, ingress, controller, operators; numbers are for the whole region."
  type = object({
    machine_type = optional(string, "n4-standard-16")
    disk_type    = optional(string, "hyperdisk-balanced")
    disk_gib     = optional(number, 200)
    min          = optional(number, 2)
    max          = optional(number, 6)
  })
  default = {}
  validation {
    condition     = var.system_nodes.min >= 2 && var.system_nodes.max >= var.system_nodes.min
    error_message = "system_nodes needs 2 <= min <= max: with one node, its loss stops the ingress and the controller together."
  }
  validation {
    condition     = !can(regex("^(a[2-9]|g[2-9])-", var.system_nodes.machine_type))
    error_message = "system_nodes.machine_type must be a CPU machine; GPU nodes are made by the module gpu-nodepool-gke."
  }
  validation {
    condition     = var.system_nodes.disk_gib >= 100
    error_message = "system_nodes.disk_gib must be at least 100: the image alone takes tens of GiB."
  }
}
