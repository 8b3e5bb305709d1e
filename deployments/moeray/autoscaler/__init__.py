"""The autoscaling policy as Ray Serve asks for it: what replicas say is observed, Serve gets the decision."""
