mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  name        = "moeray"
  zones       = ["zone-a", "zone-b", "zone-c"]
  kms_key_arn = "arn:aws:kms:us-east-1:000000000000:key/mock"
}

run "nodes_are_private_and_one_nat_serves_all_zones" {
  assert {
    condition     = [for s in aws_subnet.private : s.cidr_block] == ["10.64.0.0/18", "10.64.64.0/18", "10.64.128.0/18"]
    error_message = "three private quarters of the range"
  }
  assert {
    condition     = alltrue([for s in aws_subnet.private : !s.map_public_ip_on_launch && s.tags["kubernetes.io/role/internal-elb"] == "1"])
    error_message = "private subnets give no public address, and take internal load balancers only"
  }
  assert {
    condition     = alltrue([for s in aws_subnet.public : !s.map_public_ip_on_launch && !contains(keys(s.tags), "kubernetes.io/role/elb")])
    error_message = "no load balancer may be placed in the NAT's subnet"
  }
  assert {
    condition     = keys(aws_nat_gateway.this) == ["zone-a"] && keys(aws_route.private) == ["zone-a", "zone-b", "zone-c"]
    error_message = "one NAT gateway, used by every zone"
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.endpoints.cidr_ipv4 == "10.64.0.0/16" && aws_vpc_security_group_ingress_rule.endpoints.to_port == 443
    error_message = "VPC endpoints are for this VPC, HTTPS only"
  }
  assert {
    condition     = aws_flow_log.this.traffic_type == "ALL" && aws_cloudwatch_log_group.flow.kms_key_id == var.kms_key_arn
    error_message = "flow logs are kept, encrypted"
  }
  assert {
    condition     = jsondecode(aws_iam_role_policy.flow.policy).Statement[0].Resource == "${aws_cloudwatch_log_group.flow.arn}:*"
    error_message = "the flow log's role writes one log group"
  }
}

run "without_egress_there_is_no_internet_gateway" {
  command = plan
  variables { egress = "none" }
  assert {
    condition     = length(aws_internet_gateway.this) + length(aws_nat_gateway.this) + length(aws_route.private) + length(aws_subnet.public) == 0
    error_message = "egress = none makes nothing that leads to the internet"
  }
}

run "a_nat_per_zone_is_used_by_its_zone" {
  command = plan
  variables { egress = "nat-per-zone" }
  assert {
    condition     = length(aws_nat_gateway.this) == 3 && length(aws_route.private) == 3 && alltrue([for zone, nat in local.nat_of_zone : zone == nat])
    error_message = "a zone must not depend on another's NAT gateway"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    name                = "-"
    cidr                = "8.8.0.0/16"
    zones               = ["zone-a", "zone-a"]
    egress              = "yes"
    interface_endpoints = ["s3"]
    kms_key_arn         = "alias/moeray"
    log_days            = 8
  }
  expect_failures = [
    var.name, var.cidr, var.zones, var.egress, var.interface_endpoints, var.kms_key_arn, var.log_days,
  ]
}
