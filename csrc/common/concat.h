// Joins two words after both are expanded. It names the tables that are compiled once per level or
// dtype.
#pragma once

#define RW_CONCAT_(a, b) a##b
#define RW_CONCAT(a, b) RW_CONCAT_(a, b)
