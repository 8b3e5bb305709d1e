# What the AWS provider would answer, as far as other resources check its form. Used by every module's tests; nothing here exists.

mock_data "aws_caller_identity" {
  defaults = { account_id = "000000000000" }
}

mock_data "aws_partition" {
  defaults = { partition = "aws" }
}

mock_data "aws_region" {
  defaults = { name = "us-east-1" }
}

mock_resource "aws_iam_role" {
  defaults = { arn = "arn:aws:iam::000000000000:role/mock" }
}

mock_resource "aws_kms_key" {
  defaults = { arn = "arn:aws:kms:us-east-1:000000000000:key/mock" }
}

mock_resource "aws_cloudwatch_log_group" {
  defaults = { arn = "arn:aws:logs:us-east-1:000000000000:log-group:mock" }
}

mock_resource "aws_s3_bucket" {
  defaults = {
    id  = "mock-checkpoints"
    arn = "arn:aws:s3:::mock-checkpoints"
  }
}

mock_resource "aws_launch_template" {
  defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
}

mock_resource "aws_eks_cluster" {
  defaults = {
    endpoint              = "https://mock.invalid"
    certificate_authority = [{ data = "bW9jaw==" }]
    vpc_config            = { cluster_security_group_id = "sg-mock" }
  }
}

mock_resource "aws_eks_node_group" {
  defaults = { resources = [{ autoscaling_groups = [{ name = "mock-group" }], remote_access_security_group_id = "" }] }
}

mock_resource "aws_secretsmanager_secret" {
  defaults = { arn = "arn:aws:secretsmanager:us-east-1:000000000000:secret:mock" }
}

mock_resource "aws_elasticache_replication_group" {
  defaults = { primary_endpoint_address = "redis.mock.invalid" }
}

mock_resource "aws_vpc" {
  defaults = { id = "vpc-mock" }
}

mock_resource "aws_subnet" {
  defaults = { id = "subnet-mock" }
}

mock_resource "aws_security_group" {
  defaults = { id = "sg-mock" }
}
