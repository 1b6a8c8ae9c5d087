BUILD: dict[str, str | None]
