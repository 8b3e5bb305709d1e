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

variable "cidrs" {
  description = "Private ranges: nodes, pods, services, and Google's managed services (Redis)."
  type = object({
    nodes    = optional(string, "10.64.0.0/20")
    pods     = optional(string, "10.68.0.0/14")
    services = optional(string, "10.65.0.0/20")
    managed  = optional(string, "10.66.0.0/20")
  })
  default = {}
  validation {
    condition = alltrue([
      for cidr in values(var.cidrs) : can(cidrnetmask(cidr)) && can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", cidr))
    ])
    error_message = "cidrs must be private IPv4 ranges (10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16)."
  }
  validation {
    condition     = length(distinct(values(var.cidrs))) == 4
    error_message = "cidrs must be four different ranges."
  }
}

variable "egress" {
  description = "How nodes reach the internet: `none` (Google's own services only) or `nat`."
  type        = string
  default     = "nat"
  validation {
    condition     = contains(["none", "nat"], var.egress)
    error_message = "egress must be none or nat."
  }
}

variable "flow_log_sampling" {
  description = "Part of the flows that is logged, above 0 up to 1."
  type        = number
  default     = 0.5
  validation {
    condition     = var.flow_log_sampling > 0 && var.flow_log_sampling <= 1
    error_message = "flow_log_sampling must be above 0 and at most 1."
  }
}
