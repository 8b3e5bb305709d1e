locals {
  managed_address = split("/", var.cidrs.managed)[0]
  managed_prefix  = tonumber(split("/", var.cidrs.managed)[1])
}
