-- ARGV: now_us or '', id, requests, tokens, lease_us; then the limits (0: none): concurrent requests, requests in the
-- window, tokens in the window, tokens in the month.
-- Returns: limit that refused (0: granted) as its place above, microseconds until it would not (-1: never, -2: next
-- month), bucket, month, now_us, then what is taken of each limit, then microseconds until the window is empty.
forget()
-- The work of one call is bounded: the rest is done by later ones.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now_us - FORGOTTEN_US), 'LIMIT', 0, 100)) do
  close(id, true, nil)
end
local id, requests, tokens = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local month = month_of(now_us)
local taken = { redis.call('ZCOUNT', leases, '(' .. int(now_us), '+inf'), get('R'), get('T'), get('m' .. month) }
local wanted = { 1, requests, tokens, tokens }

-- When `over` of what is counted under this letter will have left the window.
local function free_in(letter, over)
  for _, index in ipairs(redis.call('LRANGE', buckets, 0, -1)) do
    over = over - get(letter .. index)
    if over <= 0 then return (index + NUM_BUCKETS + 1) * BUCKET_US - now_us end
  end
  return NUM_BUCKETS * BUCKET_US
end

local function wait_us(limit, over, place)
  if place == 1 then return 1000000 end
  if wanted[place] > limit then return -1 end
  if place == 4 then return -2 end
  return free_in(place == 2 and 'r' or 't', over)
end

local open = redis.call('HGET', state, 'o' .. id) -- granted already: its answer was lost on the way

-- The limit that takes longest decides.
local refused, retry_us, longest = 0, 0, -1
for place = 1, open and 0 or 4 do
  local limit = tonumber(ARGV[5 + place])
  local over = taken[place] + wanted[place] - limit
  if limit > 0 and over > 0 then
    local us = wait_us(limit, over, place)
    local rank = us == -1 and 1e300 or us == -2 and 1e299 or us
    if rank > longest then refused, retry_us, longest = place, us, rank end
  end
end

if open then
  bucket, month = string.match(open, '%d+ %d+ (%d+) (%d+) ')
elseif refused == 0 then
  if redis.call('HEXISTS', state, 'm' .. month) == 0 then -- the first of a month forgets the months of last year
    for _, field in ipairs(redis.call('HKEYS', state)) do
      local old = string.match(field, '^m(%d+)$')
      if old and tonumber(old) < month - 100 then redis.call('HDEL', state, field) end
    end
  end
  put_in(bucket, requests, tokens)
  redis.call('HINCRBY', state, 'm' .. month, int(tokens))
  redis.call('HSET', state, 'o' .. id, table.concat({ int(requests), int(tokens), int(bucket), int(month), 0 }, ' '))
  redis.call('ZADD', leases, int(now_us + ARGV[5]), id)
  taken = { taken[1] + 1, taken[2] + requests, taken[3] + tokens, taken[4] + tokens }
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, KEEP_S) end
end
local last = redis.call('LINDEX', buckets, -1)
local reset_us = last and (last + NUM_BUCKETS + 1) * BUCKET_US - now_us or 0
return { refused, retry_us, tonumber(bucket), tonumber(month), now_us, taken[1], taken[2], taken[3], taken[4], reset_us }
