"""What the service is measured beside: other ways to serve the very same network."""
