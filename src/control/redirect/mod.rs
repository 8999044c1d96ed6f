//! Orders to move clients to another server, and to take a server out of service.
