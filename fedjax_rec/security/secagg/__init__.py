"""A secure sum with real cryptography: the server learns the sum of the clients' vectors, and no single vector.

Bonawitz et al., 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", on the sparse graph of
Bell et al., 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead". Read `session.secure_sum` for one
round, `client.Client` and `server.Server` for the two sides, `messages` for what travels between them, and run
`fedjax-rec secagg demo` to see it happen.
"""
