from cache.errors import UserError
