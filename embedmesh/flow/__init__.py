"""The life of a paid request, one module a step. `paid` is the spine: it alone knows the order.

    identify     who is the caller?               (before a byte of the body is read)
    embed        the operation "embeddings"; operation: what the spine asks of any operation
    count        how many tokens are the inputs?  (the model's own tokenizer; turns: long texts, in turns by account)
    means        can the caller pay at all?       (before work that is large)
    idempotency  is it the same request again?    (with an Idempotency-Key; retries: an SDK's, without a key)
    cache        which vectors are known?         (of this account, paid before)
    bill         is there money for it?           (durable before any node is asked)
    forward      ask a node, or another
    verify       is the answer right?             (handed to forward, so that a wrong answer is tried elsewhere)
    generate     the operations "chat", "completions" and "images"; one_node: ask a node for all of it, or another
    stream       what is generated, event by event; leases: its hold lasts as long as it does
    usage        how many tokens are charged for it?  (the node's word within bounds, else our count)
    confidential the same for what only a node can read; lock: a node for it, and its money
    expire       what happens to holds whose request is lost

`world` is everything outside, handed in. The steps do not know each other.
"""
