//! Evaluates expressions.

use std::rc::Rc;

use super::arguments::CallArguments;
use super::machine::Machine;
use super::tree::*;
use super::value::{Dict, JinjaValue};
use super::{RenderResult, access, checks, fail, filters, operators};

impl Machine {
    pub(super) fn eval(&mut self, expr: &Expr) -> RenderResult<JinjaValue> {
        Ok(match expr {
            Expr::None => JinjaValue::None,
            Expr::Bool(b) => JinjaValue::Bool(*b),
            Expr::Int(n) => JinjaValue::Int(*n),
            Expr::Float(x) => JinjaValue::Float(*x),
            Expr::Str(text) => JinjaValue::from(text),
            Expr::Name(name) => self.lookup(name),
            _ => return self.deeper(|m| m.compound(expr)),
        })
    }

    fn all(&mut self, items: &[Expr]) -> RenderResult<Vec<JinjaValue>> {
        items.iter().map(|item| self.eval(item)).collect()
    }

    fn compound(&mut self, expr: &Expr) -> RenderResult<JinjaValue> {
        Ok(match expr {
            Expr::List(items) => JinjaValue::list(self.all(items)?),
            Expr::Tuple(items) => JinjaValue::tuple(self.all(items)?),
            Expr::Dict(items) => {
                let mut dict = Dict::default();
                for (key, value) in items {
                    dict.set(self.eval(key)?, self.eval(value)?)?;
                }
                JinjaValue::Dict(Rc::new(dict))
            }
            Expr::Attribute(object, name) => access::attribute(&self.eval(object)?, name)?,
            Expr::Item(object, key) => {
                let object = self.eval(object)?;
                access::item(&object, &self.eval(key)?)?
            }
            Expr::Slice(object, parts) => {
                let object = self.eval(object)?;
                let mut values = [const { JinjaValue::None }; 3];
                for (value, part) in values.iter_mut().zip(parts.iter()) {
                    if let Some(part) = part {
                        *value = self.eval(part)?;
                    }
                }
                access::slice(&object, values)?
            }
            Expr::Call(call) => {
                let callee = self.eval(&call.callee)?;
                let args = self.arguments(&call.args)?;
                self.call(&callee, args)?
            }
            Expr::Filter(value, filter) => {
                let value = self.eval(value)?;
                let args = self.arguments(&filter.args)?;
                filters::apply(self, &filter.name, value, args)?
            }
            Expr::Test(value, test) => {
                let value = self.eval(value)?;
                let args = self.arguments(&test.args)?;
                checks::check(&test.name, &value, args)?.into()
            }
            Expr::Not(value) => JinjaValue::Bool(!self.eval(value)?.is_true()),
            Expr::Negative(value) => operators::negative(&self.eval(value)?)?,
            Expr::Positive(value) => operators::positive(&self.eval(value)?)?,
            Expr::And(a, b) => {
                let a = self.eval(a)?;
                if a.is_true() { self.eval(b)? } else { a }
            }
            Expr::Or(a, b) => {
                let a = self.eval(a)?;
                if a.is_true() { a } else { self.eval(b)? }
            }
            Expr::Binary(..) => self.operators_in_a_row(expr)?,
            Expr::Concat(parts) => operators::concat(&self.all(parts)?)?,
            Expr::Compare(first, more) => {
                let mut left = self.eval(first)?;
                for (comparison, right) in more {
                    let right = self.eval(right)?;
                    if !operators::compare(*comparison, &left, &right)? {
                        return Ok(false.into());
                    }
                    left = right;
                }
                true.into()
            }
            Expr::If(parts, otherwise, line) => {
                let [condition, value] = &**parts;
                if self.eval(condition)?.is_true() {
                    self.eval(value)?
                } else if let Some(otherwise) = otherwise {
                    self.eval(otherwise)?
                } else {
                    JinjaValue::undefined(format!(
                        "the inline if-expression on line {line} evaluated to false and no else section was defined."
                    ))
                }
            }
            other => self.eval(other)?,
        })
    }

    /// `a + b + c ...`, without going deeper for each.
    fn operators_in_a_row(&mut self, expr: &Expr) -> RenderResult<JinjaValue> {
        let (mut first, mut rest) = (expr, Vec::new());
        while let Expr::Binary(operator, left, right) = first {
            rest.push((*operator, right));
            first = left;
        }
        let mut value = self.eval(first)?;
        for (operator, right) in rest.into_iter().rev() {
            value = operators::binary(operator, &value, &self.eval(right)?)?;
        }
        Ok(value)
    }

    pub(super) fn arguments(&mut self, args: &Arguments) -> RenderResult<CallArguments> {
        let mut positional = self.all(&args.positional)?;
        let mut named = Vec::with_capacity(args.named.len());
        for (name, value) in &args.named {
            named.push((name.clone(), self.eval(value)?));
        }
        if let Some(list) = &args.list {
            positional.extend(self.eval(list)?.items()?);
        }
        if let Some(map) = &args.map {
            let JinjaValue::Dict(dict) = self.eval(map)? else {
                return fail("the argument after ** must be a mapping");
            };
            for (key, value) in &dict.items {
                let Some(name) = key.as_str() else { return fail("keywords must be strings") };
                named.push((Name::from(name), value.clone()));
            }
        }
        Ok(CallArguments { positional, named })
    }

    pub(super) fn filtered(&mut self, mut value: JinjaValue, filters: &[Filter]) -> RenderResult<JinjaValue> {
        for filter in filters {
            let args = self.arguments(&filter.args)?;
            value = filters::apply(self, &filter.name, value, args)?;
        }
        Ok(value)
    }
}
