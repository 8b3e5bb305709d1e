-- ARGV: now_us or '', id, 1 if the request stays counted, tokens that it took. Returns 1 if this closed it.
forget()
return close(ARGV[2], ARGV[3] == '1', ARGV[4])
