variable "name" {
  description = "Name of the installation; the key's alias."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,28}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 30 characters: lower-case letters, digits and hyphens, a letter first, no hyphen last."
  }
}

variable "deletion_window_days" {
  description = "Days between deleting the key and losing what it encrypted."
  type        = number
  default     = 30
  validation {
    condition     = var.deletion_window_days >= 7 && var.deletion_window_days <= 30
    error_message = "deletion_window_days must be from 7 to 30 (KMS allows no other)."
  }
}
