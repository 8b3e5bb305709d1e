"""The autoscaling policy as Ray Serve asks for it: what replicas say becomes an observation, Serve gets the decision."""
