"""`astra serve` under load: chats a second, a lone request, and what a lost rank does to them."""
