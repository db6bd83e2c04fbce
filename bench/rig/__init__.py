"""What all benches share: processes, clients, stores, installing, figures, pictures, and the form of their commands."""
