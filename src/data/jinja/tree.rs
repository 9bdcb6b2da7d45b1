//! The tree of a template.

use std::sync::Arc;

/// A name; shared with the scopes that hold its value.
pub type Name = Arc<str>;
pub type Body = Vec<Statement>;

#[derive(Debug, Clone)]
pub struct Statement {
    pub line: usize,
    pub kind: NodeKind,
}

#[derive(Debug, Clone)]
pub enum NodeKind {
    Text(Arc<str>),
    Print(Vec<Expr>),
    /// Conditions with their bodies, and the body of `else`.
    If(Vec<(Expr, Body)>, Body),
    For(Box<For>),
    Set(AssignTarget, Expr),
    /// `{% set x | filter %}...{% endset %}`
    SetBlock(AssignTarget, Vec<Filter>, Body),
    With(Vec<(AssignTarget, Expr)>, Body),
    Macro(Arc<Macro>),
    Call(Box<CallBlock>),
    FilterBlock(Vec<Filter>, Body),
    Generation(Body),
    Break,
    Continue,
}

#[derive(Debug, Clone)]
pub struct For {
    pub target: AssignTarget,
    pub over: Expr,
    pub condition: Option<Expr>,
    pub body: Body,
    pub otherwise: Body,
}

#[derive(Debug, Clone)]
pub struct CallBlock {
    pub call: Call,
    /// The block as a macro, which the called one knows as `caller`.
    pub body: Arc<Macro>,
}

#[derive(Debug)]
pub struct Macro {
    pub name: Name,
    pub params: Vec<Name>,
    /// Of the last parameters.
    pub defaults: Vec<Expr>,
    pub body: Body,
    /// Whether the body reads `varargs`, `kwargs` and `caller`.
    pub varargs: bool,
    pub kwargs: bool,
    pub caller: bool,
}

#[derive(Debug, Clone)]
pub enum AssignTarget {
    Name(Name),
    /// `namespace.attribute`
    Attribute(Name, Name),
    Tuple(Vec<AssignTarget>),
}

#[derive(Debug, Clone)]
pub struct Filter {
    pub name: Name,
    pub args: Arguments,
}

/// The arguments of a call, as written.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Name, Expr)>,
    /// `*args` and `**kwargs`
    pub list: Option<Box<Expr>>,
    pub map: Option<Box<Expr>>,
}

#[derive(Debug, Clone)]
pub struct Call {
    pub callee: Box<Expr>,
    pub args: Arguments,
}

#[derive(Debug, Clone)]
pub enum Expr {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Name),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Call(Call),
    Filter(Box<Expr>, Box<Filter>),
    Test(Box<Expr>, Box<Filter>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Binary(Operator, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// `value if condition else otherwise`, with its line
    If(Box<[Expr; 2]>, Option<Box<Expr>>, usize),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operator {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}
