variable "name" {
  description = "Name of the installation; begins the name of everything made here."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,28}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 30 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "cidr" {
  description = "The VPC's private IPv4 range, /16 to /20. Every pod takes an address of it."
  type        = string
  default     = "10.64.0.0/16"
  validation {
    condition     = can(cidrnetmask(var.cidr)) && can(regex("/(16|17|18|19|20)$", var.cidr))
    error_message = "cidr must be an IPv4 range from /16 to /20, such as 10.64.0.0/16."
  }
  validation {
    condition     = can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", var.cidr))
    error_message = "cidr must lie in 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16: nodes have private addresses only."
  }
}

variable "zones" {
  description = "Availability zones, two or three. The first one is where pools of one zone should go."
  type        = list(string)
  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 3 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones must name two or three different availability zones (EKS asks for two)."
  }
}

variable "egress" {
  description = "How nodes reach the internet: `none`, `single-nat` (cheaper, lost with its zone) or `nat-per-zone`."
  type        = string
  default     = "single-nat"
  validation {
    condition     = contains(["none", "single-nat", "nat-per-zone"], var.egress)
    error_message = "egress must be none, single-nat or nat-per-zone."
  }
}

variable "interface_endpoints" {
  description = "AWS services reached through interface endpoints (each costs by the hour and zone). With `egress = \"none\"` all of the defaults are needed."
  type        = set(string)
  default     = ["ec2", "ecr.api", "ecr.dkr", "eks", "eks-auth", "sts", "logs", "autoscaling", "elasticloadbalancing", "secretsmanager"]
  validation {
    condition     = alltrue([for service in var.interface_endpoints : can(regex("^[a-z0-9.-]+$", service)) && service != "s3"])
    error_message = "interface_endpoints must be short service names such as ecr.api; s3 has a gateway endpoint already."
  }
}

variable "kms_key_arn" {
  description = "Key for the flow logs (module `encryption`)."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "kms_key_arn must be the ARN of a KMS key."
  }
}

variable "log_days" {
  description = "Days that flow logs are kept."
  type        = number
  default     = 365
  validation {
    condition     = contains([7, 14, 30, 60, 90, 180, 365, 731], var.log_days)
    error_message = "log_days must be 7, 14, 30, 60, 90, 180, 365 or 731 (what CloudWatch Logs offers)."
  }
}
