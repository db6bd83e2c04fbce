"""A request's life, one module a step.

    identify   who asks, and for what       (before a byte of the body is read)
    validate   what is asked                (pure: bytes in, a Call out)
    count      how many tokens it is        (the model's own tokenizer)
    again      is it the same request again (with an Idempotency-Key, or an SDK's retry)
    hold       is there money for it        (durable before any node is asked)
    forward    ask a node, or another
    verify     is the answer one            (handed to forward, so that a wrong answer is tried elsewhere)
    respond    the reply's bytes
    expire     what happens to holds whose request is lost

`handle` alone knows the order; the steps do not know each other.
"""
