"""What callers and operators ask a gateway for: routes, serializers, metrics, OpenAPI and pages."""
