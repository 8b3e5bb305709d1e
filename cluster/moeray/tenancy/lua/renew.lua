-- ARGV: now_us or '', lease_us, then for each reservation its id and the tokens that it has taken so far.
-- One that was closed meanwhile stays so: this may have been sent before, and come after.
local renewed = 0
for each = 3, #ARGV, 2 do
  local id, used = ARGV[each], ARGV[each + 1]
  local open = redis.call('HGET', state, 'o' .. id)
  if open then
    redis.call('ZADD', leases, int(now_us + ARGV[2]), id)
    redis.call('HSET', state, 'o' .. id, string.match(open, '%d+ %d+ %d+ %d+ ') .. used)
    renewed = renewed + 1
  end
end
return renewed
