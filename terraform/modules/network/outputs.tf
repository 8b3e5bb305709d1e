output "vpc_id" {
  description = "The VPC."
  value       = aws_vpc.this.id
}

output "vpc_cidr" {
  description = "The VPC's IPv4 range."
  value       = aws_vpc.this.cidr_block
}

output "private_subnet_ids" {
  description = "Private subnets, in the order of `zones`."
  value       = [for zone in var.zones : aws_subnet.private[zone].id]
}

output "private_subnet_id_of_zone" {
  description = "Zone -> private subnet: a pool with a placement group, EFA or reserved capacity lies in one zone."
  value       = { for zone, subnet in aws_subnet.private : zone => subnet.id }
}
