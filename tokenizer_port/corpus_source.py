"""A few lines in each of 27 languages and formats, for `corpus`. All written for this purpose."""

from __future__ import annotations

SOURCE: dict[str, str] = {
    "python": '''\
from __future__ import annotations

@dataclass(frozen=True)
class Führer:
    """A guide, with a name that is no ASCII."""

    name: str = "Grüße"
    rate: float = 3.14159e-10

    def __repr__(self) -> str:
        return f"{self.name!r:>10} {self.rate:.2%} {0x_FF_00 << 2 | 0b1010}"


async def main(*args: int, **kw: object) -> list[int]:
    squares = [x ** 2 for x in args if x % 2 != 0 and not x is None]
    lambda_ = lambda a, /, b=1: (a @ b) // -1   # noqa: E731
    return sorted(squares, key=lambda v: -v)[::-1] or [*range(10)]
''',
    "c": """\
#include <stdio.h>
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* sums an array */
static int sum(const int *v, size_t n) {
\tint s = 0;
\tfor (size_t i = 0; i < n; ++i)
\t\ts += v[i] & ~0x0Fu;
\treturn s;
}

int main(void) {
    printf("%5.2f\\t%s\\n", 3.14, "ok");
    return sum((int[]){1, 2, 3}, 3) != 6 ? 1 : 0;
}
""",
    "c++": """\
#pragma once
template <typename T, std::size_t N = 4>
class Ring final : public Base<T> {
 public:
  explicit Ring(T&& first) noexcept : data_{std::move(first)} {}
  auto operator<=>(const Ring&) const = default;
  [[nodiscard]] T at(int i) const { return data_[i % N]; }

 private:
  std::array<T, N> data_{};
};
// auto f = [&](auto&&... xs) -> int { return (0 + ... + xs); };
""",
    "rust": """\
use std::collections::HashMap;

/// Counts words.
pub fn count<'a>(text: &'a str) -> HashMap<&'a str, usize> {
    let mut seen = HashMap::new();
    for word in text.split_whitespace() {
        *seen.entry(word).or_insert(0_usize) += 1;
    }
    seen
}

#[test]
fn counts() { assert_eq!(count("a b a")["a"], 2); let _ = 1..=0xFF_u8; println!("{:?}", r#"raw"#); }
""",
    "go": """\
package main

import "fmt"

type shape interface{ area() float64 }

func main() {
\tch := make(chan int, 3)
\tgo func() { defer close(ch); ch <- 1 << 4 }()
\tfor v := range ch {
\t\tif v, ok := any(v).(int); ok && v != 0 {
\t\t\tfmt.Printf("%d %q\\n", v, `raw`)
\t\t}
\t}
}
""",
    "java": """\
package org.example;

import java.util.List;

public final class Main<T extends Comparable<T>> {
    private static final long ID = 0xCAFE_BABEL;

    @Override
    public String toString() { return "Main{" + ID + '}'; }

    public static void main(String[] args) throws Exception {
        List.of(1, 2, 3).stream().map(x -> x * 2).forEach(System.out::println);
    }
}
""",
    "javascript": """\
'use strict';
const f = async ({ x, ...rest } = {}) => {
  const re = /^[\\w.+-]+@\\d{2,}$/gi;
  await x?.y?.[0] ?? `t${1 + 2}`;
  if (typeof rest !== "undefined" && !(x === null)) { return void 0; }
};
export default f; // <- ok\r
module.exports = { f };\r
""",
    "typescript": """\
type Maybe<T> = { readonly [K in keyof T]?: T[K] } & Record<string, unknown>;
export enum Color { Red = "RED", Green = 1 << 1 }
export abstract class Store<S = {}> implements Iterable<S> {
  constructor(private items: S[] = [], protected n?: number) {}
  get<K extends keyof S>(key: K): S[K] | undefined { return this.items.at(-1)?.[key]; }
  abstract [Symbol.iterator](): Iterator<S>;
}
let x = <any>(y as unknown)!;
""",
    "c#": """\
using System;
namespace App.Models;

public record Point(double X, double Y)
{
    public double Norm => Math.Sqrt(X * X + Y * Y);
    public static Point? Parse(string s) => s?.Split(',') is [var a, var b] ? new(1d, 2d) : null;
}
#region events
public event EventHandler<int>? Changed; // $"{x,10:F2}" @"C:\\dir"
#endregion
""",
    "ruby": """\
# frozen_string_literal: true
module Shop
  class Cart
    attr_reader :items
    def initialize(*items, tax: 0.19) = (@items, @tax = items, tax)
    def total; items.sum { |i| i[:price] * (1 + @tax) }.round(2); end
    def to_s = "#{items.map(&:to_s).join(', ')} => #{total}"
    def empty? = !items.any? || %w[a b].include?("a")
  end
end
puts Shop::Cart.new({ price: 1_000 }).total unless $DEBUG
""",
    "php": """\
<?php
declare(strict_types=1);
namespace App\\Http;

final class Request {
    public function __construct(private ?array $q = null) {}
    public function get(string $k, mixed $d = null): mixed {
        return $this->q[$k] ?? $d; // "$k" and {$this->q['a']}
    }
}
echo (new Request($_GET))->get('page', 1) . PHP_EOL;
?>
""",
    "swift": """\
import Foundation

@MainActor final class Model<T: Codable>: ObservableObject {
    @Published private(set) var items: [T] = []
    func load(_ url: URL) async throws -> Int {
        guard let (data, _) = try? await URLSession.shared.data(from: url) else { return -1 }
        items += try JSONDecoder().decode([T].self, from: data)
        return items.filter { $0 is String }.count &+ 1
    }
}
""",
    "kotlin": """\
package org.example

sealed interface Result<out T>
data class Ok<T>(val value: T) : Result<T>
object Nope : Result<Nothing>

inline fun <reified T> Any?.cast(): T? = this as? T
fun main() = (1..10 step 2).map { it * it }.forEach { println("$it ${it % 3 == 0}") }
val s = \"""a
    |b\""".trimMargin()
""",
    "scala": """\
object Main extends App {
  case class User(name: String, age: Int = 0)
  implicit class Rich(val n: Int) extends AnyVal { def squared: Int = n * n }
  val users = for { n <- List("a", "b"); if n.nonEmpty } yield User(n)
  users.collect { case User(n, a) if a >= 0 => s"$n: ${a + 1}" }.foreach(println(_))
  type F[A] = A => Option[A]
}
""",
    "haskell": """\
{-# LANGUAGE LambdaCase #-}
module Main (main) where

import qualified Data.Map.Strict as M

data Tree a = Leaf | Node (Tree a) a (Tree a) deriving (Show, Eq)

insert :: Ord a => a -> Tree a -> Tree a
insert x = \\case { Leaf -> Node Leaf x Leaf; t@(Node l y r) | x < y -> t; _ -> Leaf }

main :: IO ()
main = print . M.toList $ M.fromListWith (<>) [(k, [v]) | (k, v) <- zip [1 ..] "abc"]
""",
    "lua": """\
local M = {}
--[[ counts ]]
function M.count(t, ...)
  local n, extra = #t, select('#', ...)
  for k, v in pairs(t) do if v ~= nil then n = n + 1 end end
  return n .. ":" .. extra, t[#t] or [==[raw]==]
end
return setmetatable(M, { __index = function(_, k) return rawget(_G, k) end })
""",
    "perl": """\
#!/usr/bin/perl
use strict; use warnings;
my %seen; my @in = <STDIN>;
for my $line (@in) {
    chomp $line;
    next unless $line =~ m/^\\s*(\\w+)\\s*=\\s*"([^"]*)"/x;
    $seen{$1}++ or push @{ $seen{list} //= [] }, $2;
}
print join(", ", map { "$_=$seen{$_}" } sort keys %seen), "\\n";
""",
    "bash": """\
#!/usr/bin/env bash
set -euo pipefail
for f in "$@"; do
  [[ -f "$f" && ! -L $f ]] || { echo "no: $f" >&2; continue; }
  n=$(wc -l < "$f" | tr -d ' ')
  printf '%s\\t%d\\n' "${f##*/}" "$((n + 1))" | tee -a "/tmp/log.$$" 2>/dev/null
done
cat <<-EOF
\tdone ${#@} `date +%F`
EOF
""",
    "sql": """\
WITH recent AS (
  SELECT id, SUM(amount) OVER (PARTITION BY user_id ORDER BY ts DESC) AS total
  FROM orders o LEFT JOIN users u ON u.id = o.user_id
  WHERE name <> 'it''s' AND ts >= '2024-01-31' AND o.amount BETWEEN 1.50 AND 1e3
)
SELECT * FROM recent WHERE total IS NOT NULL ORDER BY 2 LIMIT 10; -- ok
""",
    "html": """\
<!DOCTYPE html>
<html lang="de">
<head><meta charset="utf-8"><title>Größe &amp; Maße</title></head>
<body>
  <!-- x -->
  <div class="a b-c" data-n='1' onclick="go(&quot;x&quot;)">&nbsp;<br/></div>
</body>
</html>
""",
    "css": """\
@media (max-width: 40.5em) and (prefers-color-scheme: dark) {
  .card > h2::before, #main a[href^="http"]:not(:hover) {
    color: #ff00AA80; margin: -.5rem auto 0 !important;
    background: url("a.png") no-repeat, linear-gradient(45deg, rgb(1 2 3 / 50%) 10%, #fff);
    content: "\\201C"; --gap: calc(100% - 2 * var(--x, 4px));
  }
}
""",
    "r": """\
# mean of squares
f <- function(x, na.rm = TRUE, ...) {
  x <- x[!is.na(x) & x >= 1e-3]
  if (length(x) == 0L) return(NA_real_)
  sum(x ^ 2) / length(x) %>% round(2)
}
df$`new col` <- sapply(seq_len(10), \\(i) i %% 3L == 0)
""",
    "julia": """\
module Geo
export area
abstract type Shape end
struct Disc{T<:Real} <: Shape; r::T; end
area(d::Disc) = π * d.r^2   # β ≈ 0.5, x ∈ A ∪ B
area(s::Vector{<:Shape}; w = 1.0) = sum(area.(s) .* w) |> x -> round(x; digits = 2)
@assert area(Disc(1.0)) ≈ 3.14159 atol = 1e-3 "not $(area(Disc(1)))"
end
""",
    "make": """\
CFLAGS ?= -O2 -Wall
SRC := $(wildcard src/*.c)

%.o: %.c Makefile | build
\t@$(CC) $(CFLAGS) -c -o $@ $<

.PHONY: all
all: $(SRC:.c=.o)
\tgcc -o main $^ 2>/dev/null || exit 1
""",
    "yaml": """\
# deploy
version: "3.9"
services:
  web: &web
    image: repo/app:1.2.3-rc4
    ports: ["80:8080", '443:443']
    environment: {DEBUG: yes, KEY: ${KEY:-none}}
    command: >-
      run --host 0.0.0.0
  worker: {<<: *web, deploy: null}
""",
    "json": """\
{"a": [1, 2.5, -3e10, null, true], "b": {"c": "\\u00e9\\n", "d": ""}, "ключ": "значение 中文"}
""",
    "diff": """\
diff --git a/x.py b/x.py
--- a/x.py
+++ b/x.py
@@ -1,3 +1,4 @@ def f():
-    return 1
+    return 2  # was 1
     pass
""",
}
